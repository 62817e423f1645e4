-- Images that occur more than once in the corpus with identical bytes.
SELECT sha256, count(*) AS images, min(key) AS first_key, list_sort(list(DISTINCT source_key))[1:5] AS source_keys
FROM image WHERE status = 'ok' GROUP BY sha256 HAVING count(*) > 1 ORDER BY images DESC, sha256 LIMIT 100

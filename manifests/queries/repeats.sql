-- Captions that several images share word for word, the commonest first.
SELECT caption, count(DISTINCT key) AS images, min(key) AS first_key, text
FROM caption AS c WHERE status = 'ok' GROUP BY caption, text HAVING count(DISTINCT key) > 1
ORDER BY images DESC, caption, first_key, text LIMIT 50

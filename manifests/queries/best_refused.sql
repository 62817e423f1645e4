-- The refused captions with the highest mean score, each with its reason: the first candidates for a looser rule.
WITH rated AS (
    SELECT v.key, v.caption, v.candidate, v.reason, avg(s.value) AS value
    FROM verdict AS v JOIN score AS s ON s.key = v.key AND s.caption = v.caption AND s.candidate = v.candidate
    WHERE NOT v.keep AND s.value IS NOT NULL GROUP BY ALL
)
SELECT r.reason, round(r.value, 3) AS value, r.key, i.source_key, r.caption, r.candidate, c.text
FROM (FROM rated ORDER BY value DESC, key, caption, candidate LIMIT 20) AS r
JOIN caption AS c ON c.key = r.key AND c.caption = r.caption AND c.candidate = r.candidate
JOIN image AS i ON i.key = r.key ORDER BY r.value DESC, r.key, r.caption, r.candidate

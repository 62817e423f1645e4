-- The captions with the lowest scores.
SELECT s.name AS score, round(s.value, 3) AS value, c.key, i.source_key, c.caption, c.candidate, c.text
FROM score AS s
JOIN caption AS c ON c.key = s.key AND c.name = s.caption AND c.candidate = s.candidate
JOIN image AS i ON i.key = s.key
WHERE s.value IS NOT NULL ORDER BY s.value, s.key, s.name, c.caption, c.candidate LIMIT 20

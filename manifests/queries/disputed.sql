-- The captions on which the score passes differ most.
WITH spread AS (
    SELECT key, caption, candidate, max(value) - min(value) AS difference, min_by(name, value) AS lowest,
        max_by(name, value) AS highest
    FROM score WHERE value IS NOT NULL GROUP BY key, caption, candidate HAVING count(*) > 1
)
SELECT round(s.difference, 3) AS difference, s.lowest, s.highest, s.key, i.source_key, s.caption, s.candidate, c.text
FROM (FROM spread ORDER BY difference DESC, key, caption, candidate LIMIT 20) AS s
JOIN caption AS c ON c.key = s.key AND c.caption = s.caption AND c.candidate = s.candidate
JOIN image AS i ON i.key = s.key ORDER BY s.difference DESC, s.key, s.caption, s.candidate

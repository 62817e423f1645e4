-- The criteria that captions fail most, by score pass: mean value and share that the judge could not decide.
WITH answers AS (
    SELECT name AS score, caption, unnest(criteria) AS criterion FROM score
)
SELECT score, caption, regexp_replace(criterion.id, '/[0-9]+$', '') AS criterion, count(*) AS answers,
    round(avg(criterion.value), 4) AS mean, round(avg((criterion.value IS NULL)::INTEGER), 4) AS share_undecided
FROM answers GROUP BY ALL ORDER BY score, caption, mean, criterion LIMIT 200

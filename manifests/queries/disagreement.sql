-- How far each pair of score passes agrees on the same captions: correlation, mean difference, share far apart.
SELECT a.caption, a.name AS score, b.name AS other, count(*) AS captions, round(nullif(corr(a.value, b.value), 'nan'), 3) AS correlation,
    round(avg(abs(a.value - b.value)), 3) AS mean_difference,
    round(avg((abs(a.value - b.value) > 0.5)::INTEGER), 4) AS share_far_apart
FROM score AS a JOIN score AS b ON b.key = a.key AND b.caption = a.caption AND b.candidate = a.candidate
WHERE a.name < b.name AND a.value IS NOT NULL AND b.value IS NOT NULL
GROUP BY ALL ORDER BY mean_difference DESC, a.caption, score, other

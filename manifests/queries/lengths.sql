-- Caption lengths in words, compared with the corpus's own alt text.
WITH words AS (
    SELECT caption, count_words(text) AS num_words FROM caption WHERE status = 'ok'
    UNION ALL SELECT '(alt text)', count_words(alt_text) FROM image WHERE alt_text IS NOT NULL
)
SELECT caption, count(*) AS captions, round(avg(num_words), 1) AS mean, min(num_words) AS least,
    quantile_disc(num_words, 0.1) AS p10, quantile_disc(num_words, 0.5) AS median,
    quantile_disc(num_words, 0.9) AS p90, max(num_words) AS most
FROM words GROUP BY caption ORDER BY caption

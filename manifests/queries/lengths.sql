-- Caption lengths in words, compared with the corpus's own alt text.
WITH words AS (
    SELECT caption, len(regexp_extract_all(text, '\S+')) AS num_words FROM caption WHERE status = 'ok'
    UNION ALL SELECT '(alt text)', len(regexp_extract_all(alt_text, '\S+')) FROM image WHERE alt_text IS NOT NULL
)
SELECT caption, count(*) AS captions, round(avg(num_words), 1) AS mean, min(num_words) AS least,
    quantile_disc(num_words, 0.1) AS p10, quantile_disc(num_words, 0.5) AS median,
    quantile_disc(num_words, 0.9) AS p90, max(num_words) AS most
FROM words GROUP BY caption ORDER BY caption

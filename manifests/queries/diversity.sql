-- The diversity of each caption pass: distinct texts, distinct words, and the share of captions with the commonest opening.
WITH texts AS (
    SELECT caption, text, regexp_extract_all(lower(text), '[\pL\pM\pN]+') AS words FROM caption WHERE status = 'ok'
), totals AS (
    SELECT caption, count(*) AS captions, count(DISTINCT text) AS distinct_texts, sum(len(words))::BIGINT AS num_words
    FROM texts GROUP BY caption
), distinct_words AS (
    SELECT caption, count(DISTINCT word) AS distinct_words FROM (SELECT caption, unnest(words) AS word FROM texts)
    GROUP BY caption
), openings AS (
    SELECT caption, list_aggregate(words[1:4], 'string_agg', ' ') AS opening, count(*) AS num FROM texts GROUP BY ALL
), commonest AS (
    SELECT caption, max_by(opening, (num, opening)) AS opening, max(num) AS num FROM openings GROUP BY caption
)
SELECT t.caption, t.captions, t.distinct_texts, t.num_words, d.distinct_words, o.opening AS commonest_opening,
    round(o.num / t.captions, 4) AS its_share
FROM totals AS t LEFT JOIN distinct_words AS d ON d.caption = t.caption JOIN commonest AS o ON o.caption = t.caption
ORDER BY t.caption

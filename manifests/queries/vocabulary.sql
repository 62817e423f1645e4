-- The most frequent words of each caption pass, with the share of captions that use them.
WITH said AS (
    SELECT caption, unnest(list_distinct(regexp_extract_all(lower(text), '[\pL\pM\pN]+'))) AS word
    FROM caption WHERE status = 'ok'
), counted AS (
    SELECT caption, word, count(*) AS captions FROM said GROUP BY caption, word
), totals AS (
    SELECT caption, count(*) AS total FROM caption AS c WHERE status = 'ok' GROUP BY caption
)
SELECT caption, word, captions, round(captions / total, 4) AS share FROM counted JOIN totals USING (caption)
QUALIFY row_number() OVER (PARTITION BY caption ORDER BY captions DESC, word) <= 50
ORDER BY caption, captions DESC, word

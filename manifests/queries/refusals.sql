-- Why captions were refused: the first rule that said no, and how often.
SELECT caption, coalesce(reason, '(kept)') AS reason, count(*) AS captions,
    round(count(*) / sum(count(*)) OVER (PARTITION BY caption), 4) AS share
FROM verdict GROUP BY caption, reason ORDER BY verdict.caption, captions DESC

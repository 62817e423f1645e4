-- Reasons for refused captions, the first failed rule of each, with counts.
SELECT caption, coalesce(reason, '(kept)') AS reason, count(*) AS captions,
    round(count(*) / sum(count(*)) OVER (PARTITION BY caption), 4) AS share
FROM verdict GROUP BY caption, reason ORDER BY verdict.caption, captions DESC

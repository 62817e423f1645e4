-- The flags of captions: refusals, prompt leaks, meta-commentary.
SELECT caption, flag, count(*) AS captions,
    round(count(*) / (SELECT count(*) FROM caption AS c WHERE c.name = f.caption), 4) AS share
FROM (SELECT caption, unnest(flags) AS flag FROM caption) AS f GROUP BY caption, flag ORDER BY caption, captions DESC

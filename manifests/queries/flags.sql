-- The flags of captions: refusals, prompt leaks, meta-commentary.
SELECT name AS caption, flag, count(*) AS captions,
    round(count(*) / (SELECT count(*) FROM caption AS c WHERE c.name = f.name), 4) AS share
FROM (SELECT name, unnest(flags) AS flag FROM caption) AS f GROUP BY name, flag ORDER BY caption, captions DESC

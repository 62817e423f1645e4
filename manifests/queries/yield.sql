-- Numbers of images that were read, usable, captioned, kept and exported.
SELECT 'images' AS step, count(*) AS images, 1.0 AS share FROM image
UNION ALL SELECT 'usable', count(*), count(*) / nullif((SELECT count(*) FROM image), 0) FROM image WHERE status = 'ok'
UNION ALL SELECT 'selected', count(*) FILTER (NOT "drop"), count(*) FILTER (NOT "drop") / nullif((SELECT count(*) FROM image), 0) FROM curation HAVING count(*) > 0
UNION ALL SELECT 'captioned', count(DISTINCT key), count(DISTINCT key) / nullif((SELECT count(*) FROM image), 0) FROM caption WHERE status = 'ok'
UNION ALL SELECT 'kept', count(DISTINCT key), count(DISTINCT key) / nullif((SELECT count(*) FROM image), 0) FROM verdict WHERE keep
UNION ALL SELECT 'exported', count(*), count(*) / nullif((SELECT count(*) FROM image), 0) FROM export

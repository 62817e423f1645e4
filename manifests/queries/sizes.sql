-- Images by the length of their shorter side: how many there are, and the share with a kept caption.
WITH sized AS (
    SELECT key, CASE WHEN least(width, height) < 256 THEN '0-255' WHEN least(width, height) < 512 THEN '256-511'
        WHEN least(width, height) < 1024 THEN '512-1023' ELSE '1024-' END AS shorter_side,
        least(width, height) AS side, num_bytes
    FROM image WHERE status = 'ok'
)
SELECT shorter_side, count(*) AS images, round(sum(num_bytes) / 1e6, 1) AS mbytes,
    round(count(v.key) / count(*), 4) AS share_kept
FROM sized LEFT JOIN (SELECT key FROM verdict WHERE chosen) AS v USING (key) GROUP BY shorter_side ORDER BY min(side)

-- Exact duplicates: how many images and captions are copies, and in how many groups the verdicts differ.
WITH groups AS (
    SELECT sha256, count(DISTINCT i.key) AS images, count(DISTINCT v.key) FILTER (v.keep) AS kept
    FROM image AS i LEFT JOIN verdict AS v ON v.key = i.key WHERE i.status = 'ok' GROUP BY sha256
)
SELECT count(*) AS contents, sum(images)::BIGINT AS images, (sum(images) - count(*))::BIGINT AS copies,
    count(*) FILTER (images > 1) AS groups, max(images) AS largest_group,
    count(*) FILTER (images > 1 AND kept BETWEEN 1 AND images - 1) AS groups_with_mixed_verdicts
FROM groups

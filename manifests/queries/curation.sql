-- Images that curation kept, and dropped by reason; empty for runs without [curate].
SELECT coalesce(reason, '(kept)') AS reason, count(*) AS images, round(count(*) / sum(count(*)) OVER (), 4) AS share,
    count(DISTINCT "group") AS groups, max(distance) AS largest_distance
FROM curation GROUP BY reason ORDER BY curation.reason IS NOT NULL, images DESC, curation.reason

-- Drift between shards: the 20 shards whose mean score or share of kept captions is farthest from that of the run.
WITH per_shard AS (
    SELECT 'score ' || name || ' of ' || caption AS measure, key[:6]::INTEGER AS shard, count(value) AS rows,
        avg(value) AS mean, stddev_samp(value) AS spread
    FROM score GROUP BY ALL
    UNION ALL
    SELECT 'kept ' || caption, key[:6]::INTEGER, count(*), avg(keep::INTEGER), stddev_samp(keep::INTEGER)
    FROM verdict GROUP BY ALL
), whole AS (
    SELECT measure, sum(mean * rows) / sum(rows) AS mean, sqrt(sum(spread ** 2 * rows) / sum(rows)) AS spread
    FROM per_shard GROUP BY measure
)
SELECT p.measure, p.shard, p.rows, round(p.mean, 4) AS shard_mean, round(w.mean, 4) AS run_mean,
    round((p.mean - w.mean) / nullif(w.spread / sqrt(p.rows), 0), 2) AS standard_errors
FROM per_shard AS p JOIN whole AS w USING (measure) WHERE p.rows > 0
ORDER BY abs(standard_errors) DESC NULLS LAST, measure, shard LIMIT 20

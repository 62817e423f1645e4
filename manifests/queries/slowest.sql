-- The shards that took longest for their rows, against the median of their pass.
WITH paced AS (
    SELECT stage, name, caption, shard, host, seconds, num_rows, seconds / num_rows AS pace
    FROM stats WHERE num_rows > 0
)
SELECT stage, name, caption, shard, host, round(seconds, 1) AS seconds, num_rows AS rows,
    round(pace / nullif(median(pace) OVER (PARTITION BY stage, name, caption), 0), 2) AS times_median
FROM paced ORDER BY times_median DESC, stage, name, caption, shard LIMIT 20

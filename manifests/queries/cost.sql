-- The cost of each pass, and an estimate for the whole plan from the finished shards: tokens, rates, hours, files.
WITH planned AS (SELECT max(shard) + 1 AS num_shards FROM plan)
SELECT stage, name, caption, count(*) AS shards, any_value(num_shards) AS planned,
    sum(num_rows) AS num_rows, sum(num_errors) AS failed, sum(num_retries) AS retries,
    round(sum(num_rows) / nullif(sum(seconds), 0), 1) AS rows_per_second,
    round(sum(num_prompt_tokens) / nullif(sum(num_rows), 0), 1) AS prompt_tokens_per_row,
    round(sum(num_output_tokens) / nullif(sum(num_rows), 0), 1) AS output_tokens_per_row,
    round(avg(waiting), 3) AS engine_waiting,
    round(avg(seconds) * any_value(num_shards) / 3600, 2) AS hours_for_all,
    any_value(num_shards) * CASE stage WHEN 'export' THEN 4 WHEN 'ingest' THEN 3 ELSE 2 END AS files_for_all
FROM stats, planned GROUP BY stage, name, caption ORDER BY min(started_at)

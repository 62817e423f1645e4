-- The cost of a million images at each pass, and of a million kept ones: worker hours and millions of tokens.
WITH images AS (
    SELECT nullif((SELECT count(*) FROM image), 0) AS seen, nullif((SELECT count(*) FROM verdict WHERE chosen), 0) AS kept
), costs AS (
    SELECT stage, name, caption, min(started_at) AS first, sum(seconds) / 3600 AS hours,
        sum(num_prompt_tokens) / 1e6 AS prompt, sum(num_output_tokens) / 1e6 AS output
    FROM stats GROUP BY stage, name, caption
)
SELECT stage, name, caption, round(1e6 * hours / seen, 2) AS hours_per_million,
    round(1e6 * prompt / seen, 2) AS prompt_mtokens_per_million, round(1e6 * output / seen, 2) AS output_mtokens_per_million,
    round(1e6 * hours / kept, 2) AS hours_per_million_kept
FROM costs, images ORDER BY first, stage, name, caption

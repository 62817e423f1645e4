-- Captions by the attempt that gave them, with the share that is usable and its length in tokens.
SELECT caption, attempt, count(*) AS captions, round(avg((status = 'ok')::INTEGER), 4) AS share_usable,
    round(avg(num_output_tokens), 1) AS mean_tokens
FROM caption AS c GROUP BY caption, attempt ORDER BY caption, attempt

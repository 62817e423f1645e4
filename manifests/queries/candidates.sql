-- The gain of several candidates: mean score of the first and of the best candidate, and how often each is chosen.
WITH rated AS (
    SELECT name AS score, caption, key, max(value) FILTER (candidate = 0) AS first, max(value) AS best
    FROM score GROUP BY name, caption, key
), chosen AS (
    SELECT caption, count(*) AS chosen, count(*) FILTER (candidate > 0) AS later FROM verdict WHERE chosen GROUP BY caption
)
SELECT score, caption, count(*) AS images, round(avg(first), 4) AS first_candidate, round(avg(best), 4) AS best_candidate,
    any_value(chosen) AS chosen, any_value(later) AS chosen_after_the_first
FROM rated LEFT JOIN chosen USING (caption) GROUP BY score, caption ORDER BY score, caption

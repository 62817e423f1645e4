-- What each score notices: spoiled copies of captions against the originals, by kind; detection is 1 if all copies score less, 0 by chance; `recap status` says what follows.
WITH pairs AS (
    SELECT c.name, c.caption, c.kind, s.value AS original, c.value AS spoiled,
        CASE WHEN abs(s.value - c.value) < 0.005 THEN 0 ELSE sign(s.value - c.value) END AS noticed
    FROM canary AS c LEFT JOIN score AS s
        ON s.key = c.key AND s.caption = c.caption AND s.candidate = c.candidate AND s.name = c.name
), measured AS (
    SELECT name, caption, kind, count(*) AS copies, count(noticed) AS judged, avg(original) AS original, avg(spoiled) AS spoiled,
        avg(noticed) AS detection, coalesce(stddev_samp(noticed), 0) / sqrt(count(noticed)) AS error
    FROM pairs GROUP BY ALL
)
SELECT name, caption, kind, copies, judged, round(original, 3) AS original, round(spoiled, 3) AS spoiled,
    round(detection, 3) AS detection, round(greatest(detection - 1.96 * error, -1), 3) AS low,
    round(least(detection + 1.96 * error, 1), 3) AS high
FROM measured ORDER BY name, caption, detection NULLS FIRST, kind

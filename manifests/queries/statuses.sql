-- Row counts by status for images, findings, captions, rubrics and scores, with the most common error.
SELECT 'image' AS made, '' AS name, status, count(*) AS num_rows, mode(error) AS commonest_error FROM image GROUP BY ALL
UNION ALL SELECT 'finding', name, status, count(*), mode(error) FROM finding GROUP BY ALL
UNION ALL SELECT 'caption', name, status, count(*), mode(error) FROM caption GROUP BY ALL
UNION ALL SELECT 'rubric', name, status, count(*), mode(error) FROM rubric GROUP BY ALL
UNION ALL SELECT 'score', name, status, count(*), mode(error) FROM score GROUP BY ALL
ORDER BY made, name, num_rows DESC

-- What became of every input, and of every caption, rubric and score that was asked for, with the commonest message.
SELECT 'image' AS made, '' AS name, status, count(*) AS num_rows, mode(error) AS commonest_error FROM image GROUP BY ALL
UNION ALL SELECT 'caption', name, status, count(*), mode(error) FROM caption GROUP BY ALL
UNION ALL SELECT 'rubric', name, status, count(*), mode(error) FROM rubric GROUP BY ALL
UNION ALL SELECT 'score', name, status, count(*), mode(error) FROM score GROUP BY ALL
ORDER BY made, name, num_rows DESC

-- The tables of a run as views. Stand in the run's folder, then: duckdb -init PATH/TO/views.sql
-- A view whose table does not exist yet fails to be created; the others work.

-- Which inputs each shard has: frozen, growth only appends.
CREATE VIEW plan AS SELECT * FROM read_parquet('plan.parquet');

-- One row per input of the plan.
CREATE VIEW image AS SELECT * FROM read_parquet('image/*.parquet', union_by_name = true);

-- num_candidates rows per usable image and caption pass.
CREATE VIEW caption AS SELECT * FROM read_parquet('caption/*/*.parquet', union_by_name = true);

-- One row per image with a usable caption of the student, and rubric pass.
CREATE VIEW rubric AS SELECT * FROM read_parquet('rubric/*/*.parquet', union_by_name = true);

-- One row per usable caption and score pass.
CREATE VIEW score AS SELECT * FROM read_parquet('score/*/*/*.parquet', union_by_name = true);

-- One row per caption: kept, or the first reason why not.
CREATE VIEW verdict AS SELECT * FROM read_parquet('verdict/*.parquet', union_by_name = true);

-- One row per sample of the finished training set.
CREATE VIEW export AS SELECT * FROM read_parquet('export/index/*.parquet', union_by_name = true);

-- The learning curve of a training: one row per step and figure.
CREATE VIEW step AS SELECT * FROM read_parquet('step/*.parquet', union_by_name = true);

-- How each shard of each pass was made: rates, tokens, errors.
CREATE VIEW stats AS SELECT * FROM read_parquet('stats/**/*.parquet', union_by_name = true);

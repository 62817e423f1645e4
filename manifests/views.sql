-- The tables of a run as views. In the run's directory: duckdb -init PATH/TO/views.sql
-- Creating a view fails while its table does not exist; the other views work.

-- The inputs of each shard; a growing corpus only appends rows.
CREATE VIEW plan AS SELECT * FROM read_parquet('plan.parquet', hive_partitioning = false);

-- One row per input of the plan.
CREATE VIEW image AS SELECT * FROM read_parquet('image/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per image of a run with [curate]: its duplicates, and whether and why it is dropped.
CREATE VIEW curation AS SELECT * FROM read_parquet('curation/*.parquet', union_by_name = true, hive_partitioning = false);

-- num_candidates rows per usable image and caption pass. `caption` is the pass, as in the other views; `name` is the same.
CREATE VIEW caption AS SELECT *, name AS caption FROM read_parquet('caption/*/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per rubric pass and image with a usable caption of the student.
CREATE VIEW rubric AS SELECT * FROM read_parquet('rubric/*/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per score pass and usable caption.
CREATE VIEW score AS SELECT * FROM read_parquet('score/*/*/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per caption: kept, or the first reason for refusal.
CREATE VIEW verdict AS SELECT * FROM read_parquet('verdict/*.parquet', union_by_name = true, hive_partitioning = false);

-- What people say of sentences and captions; see `recap audit`.
CREATE VIEW label AS SELECT * FROM read_parquet('label/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per sample of the exported training set.
CREATE VIEW export AS SELECT * FROM read_parquet('export/index/*.parquet', union_by_name = true, hive_partitioning = false);

-- The learning curves of training: one row per step and metric.
CREATE VIEW step AS SELECT * FROM read_parquet('step/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per finished shard of each pass: rates, tokens, errors.
CREATE VIEW stats AS SELECT * FROM read_parquet('stats/**/*.parquet', union_by_name = true, hive_partitioning = false);

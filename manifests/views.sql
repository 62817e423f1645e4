-- The tables of a run as views. In the run's directory: duckdb -init PATH/TO/views.sql
-- Creating a view fails while its table does not exist; the other views work.

-- The number of words of a text. Blanks separate words, and so does punctuation of Chinese and Japanese. Of scripts without
-- blanks, each character of Chinese and of hiragana is a word, each run of katakana, and up to four characters of Thai, Lao,
-- Khmer or Burmese.
CREATE MACRO count_words(text) AS len(regexp_extract_all(text,
    '[\x{3041}-\x{309f}\x{3400}-\x{4dbf}\x{4e00}-\x{9fff}\x{f900}-\x{fad9}\x{20000}-\x{323af}]' ||
    '|[\x{30a1}-\x{30fa}\x{30fc}-\x{30ff}\x{31f0}-\x{31ff}\x{ff66}-\x{ff9f}]+' ||
    '|[\x{e01}-\x{e4e}\x{e81}-\x{ecd}\x{1000}-\x{109f}\x{1780}-\x{17d3}]{1,4}' ||
    '|[^\t\n\v\f\r\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}' ||
    '\x{3000}-\x{303f}\x{30fb}\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff20}\x{ff3b}-\x{ff40}\x{ff5b}-\x{ff65}' ||
    '\x{3041}-\x{309f}\x{3400}-\x{4dbf}\x{4e00}-\x{9fff}\x{f900}-\x{fad9}\x{20000}-\x{323af}' ||
    '\x{30a1}-\x{30fa}\x{30fc}-\x{30ff}\x{31f0}-\x{31ff}\x{ff66}-\x{ff9f}' ||
    '\x{e01}-\x{e4e}\x{e81}-\x{ecd}\x{1000}-\x{109f}\x{1780}-\x{17d3}]+'));

-- The inputs of each shard; a growing corpus only appends rows.
CREATE VIEW plan AS SELECT * FROM read_parquet('plan.parquet', hive_partitioning = false);

-- One row per input of the plan.
CREATE VIEW image AS SELECT * FROM read_parquet('image/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per image of a run with [curate]: its duplicates, and whether and why it is dropped.
CREATE VIEW curation AS SELECT * FROM read_parquet('curation/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per finder and usable image, with the list of what was found.
CREATE VIEW finding AS SELECT * FROM read_parquet('finding/*/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per thing that a finder found.
CREATE VIEW found AS SELECT * FROM (
    SELECT key, name, generate_subscripts(found, 1) - 1 AS position, unnest(found, recursive := true)
    FROM read_parquet('finding/*/*.parquet', union_by_name = true, hive_partitioning = false)
);

-- num_candidates rows per usable image and caption pass. `caption` is the pass, as in the other views; `name` is the same.
CREATE VIEW caption AS SELECT *, name AS caption FROM read_parquet('caption/*/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per rubric pass and image with a usable caption of the student.
CREATE VIEW rubric AS SELECT * FROM read_parquet('rubric/*/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per score pass and usable caption.
CREATE VIEW score AS SELECT * FROM read_parquet('score/*/*/*.parquet', union_by_name = true, hive_partitioning = false);

-- One row per score pass and spoiled copy of a caption, for runs with [canary].
CREATE VIEW canary AS SELECT * FROM read_parquet('canary/*/*/*.parquet', union_by_name = true, hive_partitioning = false);

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

"""The check that SQL of run.toml gives the same at any time: an expression from its own row, a query from its tables.

What is known to do so is allowed, and nothing else: DuckDB gains functions with each release.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import Any

UNKNOWN = "is not a function known to give the same value for the same row at all times"
AGGREGATES_OF_LISTS = ("list_aggregate", "list_aggr", "array_aggregate", "array_aggr", "aggregate")
MEMBERSHIP = {
    f"{kind}_{name}"
    for kind in ("array", "list")
    for name in ("contains", "has", "has_all", "has_any", "indexof", "position")
} | {"contains"}
CLASSES = {  # of nodes in DuckDB's parse tree
    *(
        "BETWEEN",
        "CASE",
        "CAST",
        "COLLATE",
        "COLUMN_REF",
        "COMPARISON",
        "CONJUNCTION",
        "CONSTANT",
        "FUNCTION",
        "LAMBDA",
    ),
    *("LAMBDA_REF", "OPERATOR", "TYPE"),
}
FORBIDDEN = {
    "WINDOW": "a window function, which sees other rows",
    "SUBQUERY": "a query inside",
    "STAR": "*",
    "PARAMETER": "a parameter",
}
QUERY_CLASSES = CLASSES | {"STAR", "SUBQUERY", "WINDOW"}
CLOCKS_AND_SESSIONS = {  # names that are functions where no column has them
    *("current_catalog", "current_database", "current_date", "current_role", "current_schema", "current_time"),
    *("current_timestamp", "current_user", "localtime", "localtimestamp", "session_user", "user"),
}
ZONED = {"TIMESTAMPTZ", "TIMESTAMP WITH TIME ZONE", "TIMETZ", "TIME WITH TIME ZONE"}
FUNCTIONS = set(
    """
    + - * / // % ** ^ & | ~ << >> || @ ~~ !~~ ~~* !~~* ~~~ ^@ -> ->> @> <@ && = != < <= > >=
    abs acos acosh add asin asinh atan atan2 atanh bit_count cbrt ceil ceiling cos cosh cot degrees divide even exp
    factorial fdiv floor fmod gamma gcd greatest greatest_common_divisor isfinite isinf isnan lcm least
    least_common_multiple lgamma ln log log10 log2 mod multiply nextafter pi pow power radians round round_even
    roundbankers sign signbit sin sinh sqrt subtract tan tanh trunc xor if nullif typeof

    ascii bar base64 bin bit_length char_length character_length chr concat concat_ws contains damerau_levenshtein
    decode editdist3 encode ends_with format format_bytes from_base64 from_hex hamming hash hex ilike_escape instr
    jaccard jaro_similarity jaro_winkler_similarity lcase left left_grapheme len length length_grapheme levenshtein
    like_escape lower lpad ltrim md5 md5_number mismatches nfc_normalize not_ilike_escape not_like_escape octet_length
    ord parse_dirname parse_dirpath parse_filename parse_path position prefix printf regexp_escape regexp_extract
    regexp_extract_all regexp_full_match regexp_matches regexp_replace regexp_split_to_array repeat replace reverse
    right right_grapheme rpad rtrim sha1 sha256 split split_part sqrt starts_with str_split str_split_regex
    string_split string_split_regex string_to_array strip_accents strlen strpos substr substring substring_grapheme
    suffix to_base64 to_hex translate trim ucase unhex unicode upper url_decode url_encode

    array_append array_cat array_concat array_contains array_cosine_similarity array_distance array_distinct
    array_extract array_filter array_has array_has_all array_has_any array_indexof array_intersect array_length
    array_pop_back array_pop_front array_position array_prepend array_push_back array_push_front array_reduce
    array_reverse array_reverse_sort array_slice array_sort array_to_string array_transform array_unique array_value
    element_at flatten generate_series list_any_value list_append list_apply list_avg list_bit_and list_bit_or
    list_bit_xor list_bool_and list_bool_or list_cat list_concat list_contains list_count list_cosine_similarity
    list_distance list_distinct list_dot_product list_element list_extract list_filter list_first list_grade_up
    list_has list_has_all list_has_any list_indexof list_intersect list_last list_max list_median list_min list_mode
    list_pack list_position list_prepend list_product list_reduce list_resize list_reverse list_reverse_sort
    list_select list_slice list_sort list_stddev_pop list_stddev_samp list_string_agg list_sum list_transform
    list_unique list_value list_var_pop list_var_samp list_where list_zip range apply filter reduce array_apply

    cardinality map map_contains map_entries map_extract map_extract_value map_from_entries map_keys map_values row
    struct_concat struct_extract struct_extract_at struct_insert struct_keys struct_pack struct_values
    from_json json json_array json_array_length json_contains json_exists json_extract json_extract_path
    json_extract_path_text json_extract_string json_keys json_object json_quote json_structure json_transform
    json_transform_strict json_type json_valid json_value to_json

    century date_add date_diff date_part date_sub date_trunc datediff datepart datesub datetrunc day dayname dayofmonth
    dayofweek dayofyear decade epoch epoch_ms epoch_ns epoch_us hour isodow isoyear julian last_day make_date make_time
    make_timestamp microsecond millennium millisecond minute month monthname quarter second strftime strptime
    time_bucket to_days to_hours to_minutes to_months to_seconds to_weeks to_years try_strptime week weekday weekofyear
    year yearweek
    """.split()  # noqa: SIM905
)
QUERY_FUNCTIONS = FUNCTIONS | set(
    """
    any_value arg_max arg_min argmax argmin array_agg avg bool_and bool_or count count_if count_star first group_concat
    last list listagg max max_by mean median min min_by mode product quantile_cont quantile_disc stddev stddev_pop
    string_agg sum var_pop variance

    cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number

    count_words sentences refused without_refused unnest
    """.split()  # noqa: SIM905
)


def find_problem(nodes: Iterable[dict[str, Any]]) -> str:
    """The reason why the parsed expression may see more than its row, or change with time; "" if it does not."""
    return _find_problem(nodes, CLASSES, FUNCTIONS)


def find_query_problem(nodes: Iterable[dict[str, Any]]) -> str:
    """The reason why the parsed SELECT may read more than the tables that it names, or change with time; "" if not."""
    nodes = list(nodes)
    for node in nodes:
        if node.get("type") == "SHOW_REF":
            return "it describes a table"
        if node.get("sample"):
            return "it draws a random sample"
        names = node.get("column_names")
        if isinstance(names, list) and len(names) == 1 and str(names[0]).lower() in CLOCKS_AND_SESSIONS:
            return f"{names[0]} changes with time or user"
    return _find_problem(nodes, QUERY_CLASSES, QUERY_FUNCTIONS)


def _find_problem(nodes: Iterable[dict[str, Any]], classes: Set[str], functions: Set[str]) -> str:
    for node in nodes:
        kind = node.get("class")
        if isinstance(kind, str) and kind not in classes:
            return f"it has {FORBIDDEN.get(kind, kind)}"
        if kind == "TYPE" and str(node.get("type_name")).upper() in ZONED:
            return f"{node['type_name']} depends on the machine's time zone; use TIMESTAMP"
        name = node.get("function_name")
        if isinstance(name, str) and (problem := _find_function_problem(name, node, functions)):
            return problem
    return ""


def _find_function_problem(name: str, node: dict[str, Any], functions: Set[str]) -> str:
    arguments = _list_arguments(node)
    if name.lower() == "age":
        return "" if len(arguments) == 2 else "age of one date reads the clock; age(date, date) does not"
    if name.lower() in AGGREGATES_OF_LISTS:
        aggregate = _read_constant(arguments[1]) if len(arguments) > 1 else ""
        is_known = f"list_{aggregate.lower()}" in FUNCTIONS
        return "" if is_known else f"{name} needs the name of an aggregate that also is a function, as sum in list_sum"
    return "" if name.lower() in functions else f"{name} {UNKNOWN}"


def list_members(nodes: Iterable[dict[str, Any]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The texts that parsed SQL looks for in lists, each with the column's name and the fields after its dots.

    Found in functions such as list_contains and list_has_any, and in `text IN list`, but not in text that SQL computes.
    """
    for node in nodes:
        if str(node.get("function_name")).lower() not in MEMBERSHIP:
            continue
        parts = [part for one in _list_arguments(node) for part in (one, *_list_arguments(one))]
        paths = [tuple(part["column_names"]) for part in parts if "column_names" in part]
        if len(paths) == 1:
            yield from ((paths[0], text) for part in parts if (text := _read_constant(part)))


def _list_arguments(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a function, in the trees of either version of DuckDB."""
    return [one.get("expression", one) for one in node.get("arguments") or node.get("children") or []]


def _read_constant(node: dict[str, Any]) -> str:
    """The text of a constant, in the trees of either version of DuckDB; "" for any other node."""
    value = node.get("literal", {}).get("text") or node.get("value", {}).get("value")
    return value if isinstance(value, str) else ""

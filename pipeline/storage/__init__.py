"""Files of a run: tables, parts, payloads, the plan, and SQL over them."""

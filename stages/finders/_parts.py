"""The faces and parts of bodies that NudeNet finds, in lower case."""

BARE_OR_COVERED = ("anus", "armpits", "belly", "buttocks", "feet", "female_breast", "female_genitalia")
PARTS = (
    *("face_female", "face_male", "male_breast_exposed", "male_genitalia_exposed"),
    *(f"{part}_{state}" for part in BARE_OR_COVERED for state in ("covered", "exposed")),
)

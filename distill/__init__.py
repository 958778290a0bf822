"""Pour dense students out of a teacher: initialisation and losses."""

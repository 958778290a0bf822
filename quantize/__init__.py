"""Turn weights into one set of integers and scales that every target carries."""

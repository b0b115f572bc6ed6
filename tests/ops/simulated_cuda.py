def missing():
    return "not there yet"

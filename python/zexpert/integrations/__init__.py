"""zexpert inside other libraries, a module each, which imports its library; importing this package imports none."""

"""Jobs that survive: a store in a database, pictures in files, and the workers that draw.

Needs the extra `serve`.
"""

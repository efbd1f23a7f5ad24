"""What compression cost: protocols that run on dense and on compressed models alike.

Its modules are imported one by one: those that the command line reads for its help are light.
"""

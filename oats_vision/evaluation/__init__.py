"""What compression cost: protocols that run on dense and on compressed models alike."""

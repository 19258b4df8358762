"""What every plane that carries blocks has to keep, whatever it is made of."""

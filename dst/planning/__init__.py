"""What happens to a topology, as pure functions from a method and facts to numbers and positions."""

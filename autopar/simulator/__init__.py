"""Strategy to Simulation: redistribution, prices, memory."""

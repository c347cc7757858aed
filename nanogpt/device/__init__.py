"""Select, measure and tune the device that a model runs on."""

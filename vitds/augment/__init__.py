"""uint8 crops -> normalised, mixed float images and targets, on the device that trains."""

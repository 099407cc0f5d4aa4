"""What is merged and how: sources, the average, coefficients, the merged model."""

"""Running statistics and where they go: CSV files, TensorBoard, the progress bar, a classification report."""

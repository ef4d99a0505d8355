"""What limits a launch, counted from its compiled code and the rates of a GPU."""

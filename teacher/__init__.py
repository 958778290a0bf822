"""Teachers: training a mixture of experts, opening one that exists, and writing down what it knows."""

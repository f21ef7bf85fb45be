"""Studies: experiments made of many trainings, under one parent MLflow run, with a table and plots at their end."""

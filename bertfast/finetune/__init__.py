"""Fine-tuning: read examples, make sequences of them, train a head on the packed engine, predict.

  read.py       files -> rows that know their file and line
  batches.py    token sequences -> packed batches
  task.py       what a task is: rows -> examples -> items -> predictions -> metrics
  classify.py   classification, regression, multiple choice      tag.py     tagging
  answer.py     question answering                               write.py   text to text
  metrics.py    the numbers each task is judged by
  train.py      the loop, several seeds, the best checkpoint     predict.py   a checkpoint on new text
  show.py       what is printed and drawn
"""

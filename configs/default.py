"""IMDB: an LSTM of words, pairs and log-odds, and a linear model of n-grams.

python -m flax_imdb.main

trains for 25 s on 2 CPU cores, once IMDB is prepared. Test accuracy 0.926 on
all 25,000 reviews, the mean of five seeds: 0.9248 to 0.9263. The LSTM alone,
--config.model.inputs=words+bigrams+log_odds, had 0.920 when it read all of a
review in a step and learned adversarially (RESULTS.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """All fields there are; the other configs change some of them."""
  config = ConfigDict()
  config.seed = 0  # of the initial weights, the order of reviews and dropout
  config.num_epochs = 3  # passes over the training split; 0 only evaluates
  # A small split is passed over several times in an epoch: what a recipe needs
  # is steps. 0 = once in each epoch, however few steps these are.
  config.min_steps_per_epoch = 50  # steps, reached in whole passes
  # A large one lasts for several epochs, after each of which it is validated.
  config.max_steps_per_epoch = 0  # steps, before a pass is over; 0 = no limit
  config.global_batch_size = 64  # reviews a step, over all devices
  # To evaluate and predict: no states are kept, so it may be larger. A review
  # alone takes as long as so many do.
  config.eval_batch_size = 512  # reviews at once; 0 = global_batch_size
  config.show_examples = 0  # short test reviews to print with their predictions
  config.init_from = ''  # begin with a run directory's or Keras file's weights
  config.objective = 'label'  # or language_model: pretrain, for init_from
  config.debug = False  # no jit, stop at the first NaN, show tracebacks
  # Beside TensorBoard, where it is installed: wandb, mlflow or wandb,mlflow.
  config.loggers = ''  # who else is told of each epoch; '' = none
  config.profile = ''  # 'first,n': trace n steps from this one on, for XProf

  # Optimizer
  config.optimizer = 'adam'  # rmsprop, adam, adamw or sgd
  # Rare words and pairs have gradients near 1e-7: Keras' epsilon, 1e-7, would
  # slow them down.
  config.adam_epsilon = 1e-8  # added to the root in Adam's denominator
  config.learning_rate = 5e-3  # the highest of the schedule
  config.schedule = 'cosine'  # constant, or cosine down to 0 at the last step
  config.warmup_epochs = 0.3  # linear rise from 0, in epochs
  config.weight_decay = 0.0  # a step's decay of kernels, times learning rate
  config.clip_norm = 1.0  # largest norm of the whole gradient; 0 = no limit
  config.label_smoothing = 0.0  # 0.1 of 2 classes asks for 0.05 and 0.95
  config.class_weights = 'none'  # or balanced: all classes count as much
  config.on_nan = 'stop'  # or skip: leave out steps that are not finite
  config.ema_decay = 0.99  # a step's share that averaged weights keep; 0 = off
  config.adversarial_norm = 0.0  # of what is added to embedded inputs; 0 = off
  config.adversarial_weight = 1.0  # of the loss with that added
  # The same without labels: how far it moves what is predicted.
  config.virtual_adversarial_norm = 0.0  # of what is added; 0 = off
  config.virtual_adversarial_weight = 1.0  # of the divergence, in nats
  config.entropy_weight = 0.0  # of predictions without a label, nats; 0 = off

  # After each epoch
  config.early_stopping = ConfigDict()
  # What of validation tells the best epoch: loss, accuracy, or macro_f1, the
  # mean of the classes' F1.
  config.early_stopping.monitor = 'loss'  # or one of these
  config.early_stopping.patience = 0  # epochs without a better one; 0 = never
  config.early_stopping.min_delta = 0.0  # what counts as better, same unit
  config.early_stopping.restore_best = True  # evaluate the best, not the last

  # Self-training on data.unlabelled_split
  config.self_training_rounds = 0  # teachers one after another; 0 = none
  config.teachers = ''  # run directories a,b to take labels of; '' = its own

  config.data = ConfigDict()
  # Or another set of tfds with texts and class labels, such as glue/sst2; or
  # files: your own, CSV, TSV, JSON lines or Parquet, perhaps .gz or .zst.
  config.data.name = 'imdb_reviews'  # or grammar_reviews: no network
  config.data.train_file = ''  # of files: a path or a pattern of many
  config.data.validation_file = ''  # the same; '' = validation_fraction
  config.data.test_file = ''  # the same; '' = test_fraction
  # Held out by a hash of the text, but no more than some 25,000.
  config.data.test_fraction = 0.1  # of train_file's rows, without test_file
  config.data.text_field = ''  # feature or column; 'a+b' joins two; '' = found
  config.data.label_field = ''  # feature or column; '' = found
  config.data.train_split = 'train'  # tfds split; 'train[:1000]' for a try
  config.data.test_split = 'test'  # tfds split
  config.data.unlabelled_split = ''  # to learn from, too: 'unsupervised'
  config.data.validation_split = ''  # tfds split; '' = validation_fraction
  config.data.validation_fraction = 0.1  # of the training split; or 0
  # rows: the last; text: by a hash, so that equal texts are on one side, and no
  # more than some 25,000
  config.data.validation_by = 'groups'  # that share names; or one of these
  config.data.vocab_size = 30_000  # token ids: 4 special ones, then words
  config.data.punctuation = True  # ! ? . , ; : ( ) " * are words, too
  config.data.max_length = 1000  # tokens of a review that are read
  config.data.read = 'first'  # of them; last; or spread: segments over all
  config.data.segment_length = 100  # tokens read in one; 0 = the whole review
  # A step reads some of a review's segments, drawn anew each time, and computes
  # less, and learns other parts in each pass. Evaluation reads all.
  config.data.train_segments = 1  # segments of a review in a step; 0 = all
  config.data.bucket_width = 64  # tokens; whole reviews are padded to multiples
  config.data.word_index = ''  # Keras' imdb_word_index.json gives the ids
  config.data.bigrams = 200_000  # rows of the embedding of word pairs
  config.data.log_odds_order = 3  # words of the longest n-gram with log-odds
  config.data.log_odds_ngrams = 1_000_000  # most of each length that are kept

  config.model = ConfigDict()
  config.model.inputs = 'words+bigrams+log_odds+linear'  # or fewer; ngrams.py
  config.model.members = 1  # LSTMs side by side, of which the mean predicts
  config.model.linear_weight = 1.0  # of linear's logit, where the LSTM's has 1
  config.model.cell = 'lstm'  # or simple_rnn
  config.model.embedding_dim = 32  # features a word
  config.model.width = 32  # units a layer and direction
  config.model.layers = 1  # recurrent layers, one on another
  config.model.bidirectional = True  # read from the end, too
  config.model.pooling = 'max+mean'  # of the states: last, mean, max
  config.model.hidden_dim = 0  # units of a dense layer before the logit; or 0
  config.model.word_dropout = 0.3  # share of words read as unknown
  config.model.bigram_dropout = 0.5  # share of pairs left out
  config.model.log_odds_dropout = 0.2  # share of log-odds read as 0
  config.model.embedding_dropout = 0.3  # share of features off for all words
  config.model.pooled_dropout = 0.5  # share of pooled features off
  config.model.mask_padding = True  # False reads padding, as the notebook does
  config.model.remat = True  # compute gates again going backward: less memory
  # joint = both directions in one scan; loop = on a CPU no further than the
  # longest review, however wide its batch; kernel = all of time in one kernel
  # of a TPU or GPU; auto = kernel where there is one, else scan; interpret =
  # the TPU's kernel on a CPU: slow, to check it.
  config.model.recurrence = 'scan'  # how a layer is computed, or one of these
  config.model.dtype = 'float32'  # operands of cells' products; or bfloat16
  return config

"""Data modules and loaders whose training order can be resumed at any batch."""

from lightning_altmin.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from lightning_altmin.data.base import DataSource, IndexedDataModule, Sources
from lightning_altmin.data.csv import CSVDataModule, HiggsDataModule
from lightning_altmin.data.csv_loader import CSVLoader
from lightning_altmin.data.csv_rows import CSVError, CSVFile
from lightning_altmin.data.csv_schema import RowSchema
from lightning_altmin.data.dataset_loader import DatasetLoader, DatasetSource
from lightning_altmin.data.digits import DigitsDataModule
from lightning_altmin.data.image_folder import ImageFolderDataModule
from lightning_altmin.data.image_preparation import ImagePreparation
from lightning_altmin.data.indexed_loader import IndexedLoader
from lightning_altmin.data.resumable_data_module import ResumableDataModule
from lightning_altmin.data.resumable_loader import ResumableLoader
from lightning_altmin.data.tensor_loader import TensorLoader, TensorSource
from lightning_altmin.data.vision import VisionDataModule
from lightning_altmin.trainer.progress import TrainerProgress, TrainingProgress

__all__ = [
    "CSVDataModule",
    "CSVError",
    "CSVFile",
    "CSVLoader",
    "Compose",
    "DataSource",
    "DatasetLoader",
    "DatasetSource",
    "DigitsDataModule",
    "HiggsDataModule",
    "ImageFolderDataModule",
    "ImagePreparation",
    "IndexedDataModule",
    "IndexedLoader",
    "RandomCrop",
    "RandomHorizontalFlip",
    "ResumableDataModule",
    "ResumableLoader",
    "RowSchema",
    "Sources",
    "TensorLoader",
    "TensorSource",
    "TrainerProgress",
    "TrainingProgress",
    "VisionDataModule",
]

//! Baselines: result files that have a name, kept in one folder.

use crate::error::{Error, Result};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The file of the baseline `name` in `folder`.
///
/// # Errors
///
/// [`Error::Usage`] for a name that is not made of letters, digits, `-`, `_` and `.` inside it.
pub fn path(folder: &Path, name: &str) -> Result<PathBuf> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.starts_with(['.', '-']) || !name.chars().all(legal) {
        return Err(Error::Usage(format!(
            "\"{name}\" cannot name a baseline: letters, digits, -, _ and, inside, . can"
        )));
    }
    Ok(folder.join(format!("{name}.json")))
}

/// The file that `argument` means: a file of that name, else the baseline of that name where
/// there is one.
pub fn resolve(folder: &Path, argument: &Path) -> PathBuf {
    let named = argument.to_str().and_then(|name| path(folder, name).ok());
    match named {
        Some(file) if !argument.exists() && file.exists() => file,
        _ => argument.to_owned(),
    }
}

/// Writes `text` as the baseline `name`, in place of an older one: a failure, a full disk among
/// them, leaves the older one whole. Gives its file.
///
/// # Errors
///
/// [`Error::Usage`] for a bad name; [`Error::Io`].
pub fn save(folder: &Path, name: &str, text: &[u8]) -> Result<PathBuf> {
    let file = path(folder, name)?;
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create", e))?;
    let unfinished = folder.join(format!(".{name}.{}.part", std::process::id()));
    let written = std::fs::File::create(&unfinished)
        .and_then(|mut f| f.write_all(text).and_then(|()| f.sync_all()))
        .and_then(|()| std::fs::rename(&unfinished, &file));
    written.map_err(|e| {
        // It may not even exist.
        let _ = std::fs::remove_file(&unfinished);
        Error::io(&file, "write", e)
    })?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_in_its_folder() {
        let folder = Path::new("b");
        assert_eq!(path(folder, "main-1.2_x").unwrap(), folder.join("main-1.2_x.json"));
        for bad in ["", ".", "..", "../x", "a/b", "a b", "-x", "é", ".hidden"] {
            assert!(matches!(path(folder, bad), Err(Error::Usage(_))), "{bad}");
        }
    }

    #[test]
    fn saving_replaces_whole_files_only_and_a_file_goes_before_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("baselines");
        let file = save(&inside, "main", b"1").unwrap();
        save(&inside, "main", b"2").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"2");
        assert_eq!(std::fs::read_dir(&inside).unwrap().count(), 1, "nothing unfinished is left");
        assert_eq!(resolve(&inside, Path::new("main")), file);
        assert_eq!(resolve(&inside, &file), file);
        assert_eq!(resolve(&inside, Path::new("other")), Path::new("other"));
        // A folder in the file's place cannot be replaced.
        std::fs::create_dir(inside.join("bad.json")).unwrap();
        assert!(matches!(save(&inside, "bad", b"3"), Err(Error::Io { .. })));
        assert_eq!(std::fs::read_dir(&inside).unwrap().count(), 2);
    }
}
